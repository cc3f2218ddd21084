"""P1: is it the method, the number of registers or the data that costs Registering its accuracy?"""
