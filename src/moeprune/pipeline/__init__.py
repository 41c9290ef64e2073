"""The road from calibration text to metrics: stages, their cache on disk, and the run that walks them."""
