"""Speed and memory: contenders, timing in processes of their own, reports."""
