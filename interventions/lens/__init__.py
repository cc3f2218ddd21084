"""What the residual stream says on its way: the logit lens, direct logit attribution, and the circuits of heads."""
