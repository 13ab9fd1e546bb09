"""Attribution graphs: what transcoders' features do to one another and to the next token's logits, at one prompt."""
