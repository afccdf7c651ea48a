"""Which sites of a frozen model get a task's experts, under a budget: a part for any method."""
