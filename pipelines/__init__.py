"""Order of the steps, what is already done, and the hand-over of each step to Ray. See docs/pipelines.md."""
