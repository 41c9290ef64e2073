"""Tables for the terminal and for every format."""
