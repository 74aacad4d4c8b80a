"""What several tests of this plugin need."""
