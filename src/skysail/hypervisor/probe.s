# The boot sector that accelerator.py runs: 64-bit mode, paging, SSE, then "out 0xf4" with 42.
# as --64 -o probe.o probe.s && ld -Ttext 0x7c00 --oformat binary -o probe.bin probe.o
.code16
.globl _start
_start:
 cli
 xorw %ax,%ax
 movw %ax,%ds
 movw %ax,%es
 movw %ax,%ss
 movw $0x7c00,%sp
 # page tables: 0x1000 PML4, 0x2000 PDPT, 0x3000 PD (one 2 MiB page... identity)
 movw $0x1000,%di
 xorl %eax,%eax
 movw $0x0c00,%cx
 cld
 rep stosl
 movl $0x2003,0x1000
 movl $0x3003,0x2000
 movl $0x0083,0x3000
 lidt idt
 movl %cr4,%eax
 orl $0x20,%eax
 movl %eax,%cr4
 movl $0x1000,%eax
 movl %eax,%cr3
 movl $0xc0000080,%ecx
 rdmsr
 orl $0x100,%eax
 wrmsr
 movl %cr0,%eax
 orl $0x80000001,%eax
 movl %eax,%cr0
 lgdt gdtr
 ljmp $8,$long
.code64
long:
 movw $16,%ax
 movw %ax,%ds
 movw %ax,%es
 movw %ax,%ss
 movq $0x7c00,%rsp
 # SSE: what an accelerator that only emulates real mode falls over
 movq %cr0,%rax
 andb $0xfb,%al
 orb $2,%al
 movq %rax,%cr0
 movq %cr4,%rax
 orw $0x600,%ax
 movq %rax,%cr4
 movq $0x1122334455667788,%rax
 movq %rax,%xmm0
 movq %xmm0,%rbx
 cmpq %rax,%rbx
 jne .
 movl $0x100000,%ecx
1: loop 1b
 movb $0x2a,%al
 outb %al,$0xf4
 hlt
 jmp .
.balign 8
gdt:
 .quad 0
 .quad 0x00af9a000000ffff
 .quad 0x00cf92000000ffff
gdtr:
 .word 23
 .long gdt
idt:
 .word 0
 .long 0
.org 510
 .word 0xaa55
