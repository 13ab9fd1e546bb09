"""Attribution graphs: effects of transcoders' features on one another and on the next token's logits, at one prompt."""
