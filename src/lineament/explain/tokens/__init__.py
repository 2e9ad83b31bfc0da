"""Which tokens of the context made a language model say this word? ReAGent, its rivals, and whether they are true."""
