_base_ = 'vig_h_t_upernet.py'

model = dict(backbone=dict(arch='small'))
