"""The other processes of a run: process group, collectives, votes, data-parallel replication."""
