"""From a promoted artifact to its users: files of llama.cpp with their parity measured, and the hub."""
