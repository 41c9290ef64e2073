"""Tables, plots and plain sentences, made only from the files that runs wrote."""
