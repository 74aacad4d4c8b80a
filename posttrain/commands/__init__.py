"""The commands of ``posttrain``, a file each: ``main(words)`` runs one and returns its exit code."""
