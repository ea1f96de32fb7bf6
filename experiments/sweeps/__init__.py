"""Many runs: what is compared, processes that run it, tables and pictures of it."""
