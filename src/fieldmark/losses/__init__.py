"""Losses: plain functions of tensors that state a paper's formula, and the loss classes around them."""
