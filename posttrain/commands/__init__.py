"""The commands of ``posttrain``, one file each."""
