"""One run: its directory, its jobs, training, judging, display, interrupts."""
