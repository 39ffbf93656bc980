"""What the verbs of the command line do; one module for each kind of verb."""
