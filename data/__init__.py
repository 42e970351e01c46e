"""Pictures in: one reader per data set, their registry, and batches."""
