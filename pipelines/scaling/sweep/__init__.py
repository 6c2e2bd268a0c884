"""A sweep: many models of a grid, trained side by side on shared data, whose held-out losses feed the law."""
