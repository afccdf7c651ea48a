"""Parts of methods by name, and which of them go together: what a recipe is made of."""
