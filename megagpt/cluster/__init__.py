"""Which rank this process is and who the others are: hostfiles, launchers, rendezvous.

Only ``rendezvous`` needs torch.
"""
