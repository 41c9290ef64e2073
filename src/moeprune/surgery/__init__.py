"""The only place that cuts weights."""
