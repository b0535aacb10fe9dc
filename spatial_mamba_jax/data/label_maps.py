"""Label maps."""

# The label of a pixel that no loss and no score counts.
IGNORED = -1
