"""Which conditions are run, collected and compared."""
