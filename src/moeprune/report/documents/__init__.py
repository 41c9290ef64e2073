"""A report, and the formats it is written in."""
