"""Who this rank is and who the others are: hostfiles, launchers, processes, rendezvous.

Only ``rendezvous`` needs torch.
"""
