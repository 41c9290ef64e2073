"""The report as one web page that holds everything it shows."""
