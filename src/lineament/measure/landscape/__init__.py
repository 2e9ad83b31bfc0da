"""How the loss looks around and between networks, and what its Hessian's spectrum says."""
