"""What the ranks of a pool do for the tests; ``pool.run('tests.support.jobs.FILE:FUNCTION')``."""
