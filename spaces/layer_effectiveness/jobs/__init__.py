"""Analyses: the task, the estimate of its time, the queue, and the process that runs it."""
