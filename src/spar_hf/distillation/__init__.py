"""What `training/distill.py` and `training/cache_teacher.py` share: data, teacher, feature cache, what trains."""
