"""The trainer and its parts: it knows the contract of a task, no task and no model by name."""
