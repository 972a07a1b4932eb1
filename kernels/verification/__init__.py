"""Checks of what the compiler made for this GPU: self-check, ptxas in use, proxy fence."""
