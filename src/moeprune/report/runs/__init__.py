"""What runs wrote, read and brought together over seeds."""
