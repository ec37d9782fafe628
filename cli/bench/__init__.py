"""`fedloom bench`: what tuning in a subspace costs on this machine, beside what it is measured against."""
