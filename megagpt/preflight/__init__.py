"""Check every host before a run: ssh, software, devices, disks, bandwidth.

``host_probe`` and ``link_ranks`` are the programs that run on the other hosts.
"""
