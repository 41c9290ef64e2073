"""Text sources -> token windows -> one statistics pass that serves every scorer."""
