_base_ = 'vig_h_t_maskrcnn.py'

model = dict(backbone=dict(arch='small'))
