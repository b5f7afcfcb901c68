// The kernels in a process of their own, for another processor: see tests/emulated_kernels.py.
//
// Arguments are a file, and the address at which its memory is to be: all pointers are into it. Each line of stdin is the
// name of a function, its arguments that are no floats, and that which is one; what it returns is a line of stdout.
#include "../llama/backends/cpu/csrc/kernels.cpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <iostream>
#include <string>

int main(int, char **arguments) {
    const int file = open(arguments[1], O_RDWR);
    struct stat status;
    if (fstat(file, &status) != 0) return 2;
    void *at = (void *)strtoull(arguments[2], nullptr, 10);
    if (mmap(at, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != at) return 3;
    std::cout << instructions() << std::endl;
    for (std::string name; std::cin >> name;) {
        long a[9];
        float real;
        for (long &argument : a) std::cin >> argument;
        std::cin >> real;
        // Whole numbers and floats are passed in registers of their own, so that their order does not matter.
        using Function = int (*)(long, long, long, long, long, long, long, long, long, float);
        auto function = (Function)dlsym(RTLD_DEFAULT, name.c_str());
        if (!function) return 4;
        std::cout << function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], real) << std::endl;
    }
}
