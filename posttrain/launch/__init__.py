"""Several processes for one stage: their number, the job they read, the program that starts them, their end."""
