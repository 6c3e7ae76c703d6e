"""What a controller predicts of the next iteration, and fitted predictors to do it with."""
