/// Position ids of tokens that follow others, by the scheme that the manifest names.
public enum Positions {
    case line
    case mrope

    var rows: Int { self == .line ? 1 : 3 }

    /// Rows of position ids for `ids` from `first` on, and the first position after them.
    ///
    /// `grids`: rows and columns of tokens of each view among them, in order.
    func of(_ ids: [Int], imageToken: Int, grids: [(rows: Int, columns: Int)], first: Int) throws -> ([[Int]], Int) {
        if self == .line { return ([Array(first..<first + ids.count)], first + ids.count) }
        let slots = ids.filter { $0 == imageToken }.count
        if slots != grids.reduce(0, { $0 + $1.rows * $1.columns }) {
            throw PocketError("prompt: \(slots) image tokens do not fill the picture's views; re-export")
        }
        var out = [[Int]](repeating: [], count: 3)
        var next = first
        var place = 0
        var view = 0
        while place < ids.count {
            if ids[place] == imageToken {
                let grid = grids[view]
                for token in 0..<grid.rows * grid.columns {
                    out[0].append(next)
                    out[1].append(next + token / grid.columns)
                    out[2].append(next + token % grid.columns)
                }
                next += max(grid.rows, grid.columns)
                place += grid.rows * grid.columns
                view += 1
            } else {
                for row in 0..<3 { out[row].append(next) }
                next += 1
                place += 1
            }
        }
        return (out, next)
    }
}
