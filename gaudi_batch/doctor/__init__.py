"""What keeps a node, or a cluster, from running a job: looked at before the job is."""
