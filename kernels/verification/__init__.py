"""Is what the compiler made right on this GPU? Self-checks, the ptxas in use, the proxy fence."""
