"""What the processes of one search share: torch.distributed's collectives, and what is sent by them."""
