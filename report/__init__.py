"""What looks at a model: plots, galleries, a tokenizer's health, a judge, likelihoods."""
