"""Hessian, Gauss-Newton and Fisher as operators; their eigenpairs, trace and spectral density."""
