"""How the jobs of a sweep are started: in this process, on this machine, or on a SLURM cluster."""
