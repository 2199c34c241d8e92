"""Work in shards that run in this process, in processes of this machine, or on the machines of a cluster."""
