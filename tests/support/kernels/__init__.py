"""What the tests of the kernels share: the rule of accuracy, refusals, a Gluon interpreter."""
